"""What happens to a frame: stream batch, step rules, residual guidance, noise. Pure torch."""
