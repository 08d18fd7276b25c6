"""A page on this machine where a person says right or wrong to a sample's images, one key each."""
