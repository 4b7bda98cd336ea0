"""What ranks send each other, and on which process groups."""
