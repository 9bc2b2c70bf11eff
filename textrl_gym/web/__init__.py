"""Pages over HTTP.

- `server`: pages and actions, to this machine or with a token to others
- `annotate`: the annotation page
- `watch`: a comparison's page while its runs go on
"""
