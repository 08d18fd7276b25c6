"""Tables: an output for readers of Delta Lake and of Iceberg. Derived from the ledgers, and never what counts."""
