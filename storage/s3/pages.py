"""Pages of an S3 listing, parsed without a Python object for each field of an object.

botocore makes a dict for each object, with a date in it, which takes ten times as long as the parsing of the XML. So
the objects are taken out of the document before botocore parses the rest of it. botocore still signs, sends, and finds
the errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import unquote_plus
from xml.etree.ElementTree import Element, ParseError, XMLParser, tostring

from storage.store import Unreachable, show

_FOUND = "SightlinePage"
# The response's key under which the page is handed over. It belongs to one request, so threads share nothing.
_EVENT = "before-parse.*.ListObjectsV2"
# With the wildcard, botocore calls the function before its own search of the body for an error, which parses the whole
# body. Called after it, the page would be the same, and take twice as long.


class Page(NamedTuple):
    """One page: the keys, sizes in bytes and ETags of its objects, and its common prefixes, which end with a slash.

    `token` continues the listing. It is None on the last page.
    """

    keys: list[str]
    sizes: list[int]
    etags: list[str]
    folders: list[str]
    token: str | None


def watch_pages(client: Any) -> None:
    """Let `request_page` be called with this client of boto3. Its `list_objects_v2` returns no objects from now on."""
    client.meta.events.register(_EVENT, _take_objects)


def request_page(client: Any, uri: str, arguments: dict[str, Any]) -> Page:
    """Request a page with these arguments of `list_objects_v2`. `uri` is for the message.

    Raises `Unreachable` for a response that is no complete page, and the errors of botocore.
    """
    # botocore requests URL-encoded names, because XML cannot hold every character of a key.
    response: dict[str, Any] = client.list_objects_v2(**arguments)
    found: Page | None = response.get(_FOUND)
    token = response.get("NextContinuationToken")
    # A response whose body was lost is parsed as an empty listing.
    if found is None or "IsTruncated" not in response or (response["IsTruncated"] and token is None):
        raise Unreachable(f"{show(uri)}: S3 responded with an incomplete page of a listing")
    return found._replace(token=token if response["IsTruncated"] else None)


def _take_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Move the objects and common prefixes from the body of a response to the dict that botocore's caller gets."""
    if response_dict["status_code"] != 200:
        return
    parser = XMLParser(encoding="utf-8")
    try:
        parser.feed(response_dict["body"])
        root: Element = parser.close()
    except ParseError:
        return  # botocore raises it, as a response that broke off
    if root.tag == "Error":
        return
    space = root.tag[: root.tag.rfind("}") + 1]
    objects, prefixes = f"{space}Contents", f"{space}CommonPrefixes"
    contents = [child for child in root if child.tag == objects]
    keys = _texts(contents, f"{space}Key")
    sizes = _texts(contents, f"{space}Size")
    etags = _texts(contents, f"{space}ETag")
    folders = _texts([child for child in root if child.tag == prefixes], f"{space}Prefix")
    if keys is None or sizes is None or etags is None or folders is None:
        return  # `request_page` refuses the page
    if root.findtext(f"{space}EncodingType") == "url":
        keys, folders = _decode(keys), _decode(folders)
    root[:] = [child for child in root if child.tag not in (objects, prefixes)]
    etags = [etag.strip('"') for etag in etags]
    customized_response_dict[_FOUND] = Page(keys, [int(size) for size in sizes], etags, folders, None)
    response_dict["body"] = tostring(root)


def _texts(elements: list[Element], tag: str) -> list[str] | None:
    """The text of a child of each element, or None if an element has no such child."""
    texts = [element.findtext(tag) for element in elements]
    return None if None in texts else texts  # type: ignore[return-value]  # mypy does not see that none is None


def _decode(names: list[str]) -> list[str]:
    """Decode URL-encoded names as botocore does, with a plus for a blank."""
    # Ceph encodes slashes too. Replacing them, and decoding all names at once, takes a third of the time.
    joined = "\n".join(names).replace("%2F", "/")
    decoded = (unquote_plus(joined) if "%" in joined or "+" in joined else joined).split("\n")
    # A line feed in a name is encoded as %0A, so there are more lines than names if a name has one.
    return decoded if len(decoded) == len(names) else [unquote_plus(name) for name in names]
