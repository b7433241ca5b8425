"""Parts that methods are assembled from: pure functions on tensors, and the leaves they need."""
