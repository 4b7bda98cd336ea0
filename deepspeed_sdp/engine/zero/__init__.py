"""The ZeRO optimizer over owner sets: buckets, gradients, weights, the step."""
