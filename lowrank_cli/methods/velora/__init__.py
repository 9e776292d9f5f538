"""VeLoRA: activations kept along one vector, gradients in factored form."""
