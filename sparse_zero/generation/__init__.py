"""Answers of a language model: a conversation in a terminal, and the prompts of a recipe's evaluation examples.

Others import from `answers`, `chat`, `language_model`.
"""
