"""The stores of Google Cloud Storage (`gs://`) and Azure Blob Storage (`az://`), through obstore."""
