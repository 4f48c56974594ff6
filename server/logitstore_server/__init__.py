"""The service: stores over HTTP, read-only, denied by default.

`app.create_app(settings)` answers requests; `secure.secure(app, settings)` stands in front of it;
`serving.serve(settings)` runs both in worker processes.
"""
