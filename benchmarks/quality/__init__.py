"""What subnetworks cost in validation loss: a fast simulation of all workers in one process, its sweeps and tables."""
