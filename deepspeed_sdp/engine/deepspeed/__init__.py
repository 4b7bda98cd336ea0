"""What is known of DeepSpeed from inside: what it must be, what is refused, how it is started, and it alone."""
