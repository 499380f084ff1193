"""The doors: one per verb. Each parses, calls the library, and says where the result is."""
