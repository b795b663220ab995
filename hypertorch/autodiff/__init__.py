"""What PyTorch gives and gets wrong: products with derivatives, the inner gradient, noise, live memory."""
