"""What people's answers say about the labels: estimates, calibration, probes, suspect answers."""
