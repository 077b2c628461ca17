"""The networks, how they learn within a trajectory, and how they are meta-trained and meta-tested."""
