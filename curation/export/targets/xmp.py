"""XMP sidecar files with the labels as keywords, for darktable, digiKam, ExifTool and, with a rename, Lightroom."""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

from curation.export.destination import write_new
from curation.export.job import Job, Target
from curation.export.names import add_tag, make_path

_ROWS = 4096
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Sightline">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/">
{content}  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def write(job: Job, path: str) -> None:
    """Write a file `KEY.xmp` for each row to a folder, which so mirrors the folders of the keys.

    The file of `a/b.jpg` is `a/b.jpg.xmp`, also for a key without an extension. The name with the whole file name is
    what darktable and digiKam read, and what keeps `b.jpg` and `b.png` apart. An image without a label has a sidecar
    without keywords. Memory holds 4,096 rows.
    """
    groups = {name: group for group, members in job.output.labels.groups.items() for name in members}
    renamed = 0
    for batch in job.rows(["key", "id", "labels"], _ROWS):
        columns = (batch[name].to_pylist() for name in ("key", "id", "labels"))
        for key, row_id, labels in zip(*columns, strict=True):
            wanted = make_path(key)
            names = [f"{wanted}.xmp", f"{add_tag(wanted, row_id)}.xmp", f"{add_tag('image', row_id)}.xmp"]
            written = write_new(Path(path), names, make_packet(labels or [], groups).encode())
            renamed += written != f"{key}.xmp"
    if renamed:
        job.notices.append(f"{renamed:,} sidecars have another name than their key, which is no free path")


def make_packet(labels: list[str], groups: dict[str, str]) -> str:
    """Return the XMP packet with these labels. `groups` has the group of each label that is in one.

    `dc:subject` has the labels, `lr:hierarchicalSubject` each label with its group before it: `group|label`. A vertical
    bar in a name is a slash there, because it would make a level. Characters that XML cannot contain are U+FFFD.
    """
    levels = [[groups[name], name] if name in groups else [name] for name in labels]
    content = _make_bag("dc:subject", labels)
    content += _make_bag("lr:hierarchicalSubject", ["|".join(name.replace("|", "/") for name in one) for one in levels])
    return _PACKET.format(content=content)


def _make_bag(name: str, values: list[str]) -> str:
    if not values:
        return ""
    items = "".join(f"     <rdf:li>{escape(_FORBIDDEN.sub(chr(0xFFFD), value))}</rdf:li>\n" for value in values)
    return f"   <{name}>\n    <rdf:Bag>\n{items}    </rdf:Bag>\n   </{name}>\n"


TARGET = Target("none", write)
