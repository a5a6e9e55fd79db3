"""Work only where the picture moves. torch only."""
