"""What one training holds between the trainer's events."""
