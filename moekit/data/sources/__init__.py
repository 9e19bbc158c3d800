"""Where text comes from: one interface, one kind of source per file."""

from moekit.data.sources.aligned import AlignedSource as AlignedSource
from moekit.data.sources.babel import Babel as Babel
from moekit.data.sources.babel import BabelSettings as BabelSettings
from moekit.data.sources.babel import Headlines as Headlines
from moekit.data.sources.base import SPLITS as SPLITS
from moekit.data.sources.base import Direction as Direction
from moekit.data.sources.base import Source as Source
from moekit.data.sources.base import Split as Split
from moekit.data.sources.gettext import Gettext as Gettext
from moekit.data.sources.jsonl import JsonLines as JsonLines
from moekit.data.sources.moses import Moses as Moses
from moekit.data.sources.opening import KINDS as KINDS
from moekit.data.sources.opening import open_source as open_source
from moekit.data.sources.text import Text as Text
from moekit.data.sources.tsv import Tsv as Tsv
from moekit.data.sources.union import Union as Union
