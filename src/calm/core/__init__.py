"""Pure maths of CALM on tensors: no modules, no configuration, no hidden randomness."""
