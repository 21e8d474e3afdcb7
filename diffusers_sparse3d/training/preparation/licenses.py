"""Licences of meshes: one spelling for each, and which of them allow commercial use."""

import re


# As Sketchfab and Objaverse name them -> SPDX identifiers, where there is one.
SKETCHFAB_LICENSES = {
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
    "cc0": "CC0-1.0",
    "ed": "Sketchfab-Editorial",
    "st": "Sketchfab-Standard",
}
# "by-nc", "CC-BY-NC-SA-4.0", "Attribution-NonCommercial"; news and criticism alone: "Editorial".
NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?\s?commercial|editorial", re.IGNORECASE)


def is_non_commercial(license: str) -> bool:
    """Whether the name of a licence says that commercial use is not allowed; "" does not say so."""
    return bool(NON_COMMERCIAL.search(license))
