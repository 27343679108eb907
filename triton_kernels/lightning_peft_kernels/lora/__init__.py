"""The LoRA linear layer in one autograd function, and the gradients of its factors."""
