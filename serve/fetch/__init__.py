"""Images out of requests: data URIs, base64 and URLs."""
