"""What is taken from strangers, and from whom. Pure standard library."""
