"""Where text comes from: one interface, one kind of source per file."""

from moekit.data.sources.babel import Babel as Babel
from moekit.data.sources.babel import BabelSettings as BabelSettings
from moekit.data.sources.base import SPLITS as SPLITS
from moekit.data.sources.base import Direction as Direction
from moekit.data.sources.base import Source as Source
from moekit.data.sources.base import Split as Split
