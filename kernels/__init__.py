"""Fused operations beside their plain torch reference. Pure torch."""
