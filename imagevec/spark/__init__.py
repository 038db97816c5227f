"""The Spark interface: UDFs, ML stages and settings."""
