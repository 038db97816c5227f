"""Where imagevec meets Spark."""
