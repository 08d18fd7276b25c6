"""The batch job: image shards in object storage to labels and embeddings in Parquet."""
