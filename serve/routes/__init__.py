"""The routes: one module for each client's API. `serve.http.app.ROUTES` lists what registers them."""
