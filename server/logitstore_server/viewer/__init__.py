"""Pages that show what a teacher thought: stores, samples, searches, comparisons.

routes = viewer_routes({"demo": logitstore.store.open("STORE")})    # for any Starlette app

Reading order: logitstore.display -> links -> viewed_store -> store_page, sample_page, find, compare
-> routes.
"""

from logitstore_server.viewer.links import Links
from logitstore_server.viewer.routes import SECURITY_HEADERS, viewer_app, viewer_routes

__all__ = ["SECURITY_HEADERS", "Links", "viewer_app", "viewer_routes"]
