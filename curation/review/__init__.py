"""Review of a sample by people: a local web page, the file of answers, and Label Studio as an alternative."""
