"""
The web app, `diffusers-sparse3d app`: a photo to a mesh in the browser. It takes the extra `app`.

- `generation.py`: one generation with its progress, without a user interface.
- `files.py`: the files that browsers fetch.
- `interface.py`: what is on the page, and what its buttons do.
- `server.py`: settings and limits of the server.
"""
