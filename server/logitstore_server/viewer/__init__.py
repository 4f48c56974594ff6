"""Pages that show what a teacher thought: stores, samples, searches, comparisons.

routes = viewer_routes({"demo": logitstore.store.open("STORE")})    # for any Starlette app

Reading order: links -> viewed_store -> glyphs, entries, measures -> store_page, sample_page, find,
compare -> routes.
"""

from logitstore_server.viewer.routes import viewer_app, viewer_routes

__all__ = ["viewer_app", "viewer_routes"]
