"""Pages over HTTP.

- `server`: pages and actions, to this machine or with a token to others
- `annotate`: the annotation page
- `watched`: what a folder holds, and how far its runs are
- `watch`: its page while runs go on
"""
