"""The schema of a recipe, and the shipped recipes and DeepSpeed files. Only `training` imports torch.

Others import from `launch`, `learning_rate`, `lookup`, `method`, `names`, `objective`, `quantization`, `recipe`,
`secrets`, `shipped`, `training`.
"""
