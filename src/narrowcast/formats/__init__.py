"""Number formats, bit-exact."""

from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.codec import cast, decode, encode
from narrowcast.formats.granularity import PerBlock, PerChannel, PerTensor
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.packing import pack, unpack
from narrowcast.formats.quantized import QuantizedTensor, quantize
from narrowcast.formats.table import get
