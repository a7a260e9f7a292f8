"""Number formats, bit-exact."""

from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.codec import cast, decode, encode
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.table import get
