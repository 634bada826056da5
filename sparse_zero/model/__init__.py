"""The sparse parametrisation: frozen weights with a trainable delta at their selected positions, and `sparsify`, which
applies it to a model.

Others import from `activation`, `fingerprint`, `finite`, `gradients`, `kept`, `reference`, `requantize`,
`selected_scalars`, `sparse_model`, `sparsify`, `sparsity`, `subclassed`, `weight`, `weight_tensor`, `wrappers`.
"""
