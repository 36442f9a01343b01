"""Generate text from a trained model: key-value caches, one-token steps, sampling."""
