"""Plans executed by PyTorch, and every quantity of them held against the prediction."""
