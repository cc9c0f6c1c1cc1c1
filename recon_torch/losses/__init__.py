"""What renders and views are compared by, as losses and as metrics."""
