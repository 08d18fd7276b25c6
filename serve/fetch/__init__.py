"""Reading the images of requests: from data: URIs, base64 and URLs."""
