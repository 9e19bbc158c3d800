"""Where text comes from: one interface, one kind of source per file.

A class with `register_source` is a kind of source as soon as its file is imported: here, in one line.
"""

from moekit.babel import Babel as Babel
from moekit.babel import BabelSettings as BabelSettings
from moekit.babel import Facts as Facts
from moekit.babel import Headlines as Headlines
from moekit.data.sources.aligned import AlignedSource as AlignedSource
from moekit.data.sources.datasets import Datasets as Datasets
from moekit.data.sources.documents import Documents as Documents
from moekit.data.sources.examples import Examples as Examples
from moekit.data.sources.gettext import Gettext as Gettext
from moekit.data.sources.jsonl import JsonLines as JsonLines
from moekit.data.sources.moses import Moses as Moses
from moekit.data.sources.text import Text as Text
from moekit.data.sources.tsv import Tsv as Tsv
from moekit.data.sources.union import Union as Union
from moekit.source import KINDS as KINDS
from moekit.source import SPLITS as SPLITS
from moekit.source import Direction as Direction
from moekit.source import Source as Source
from moekit.source import Split as Split
from moekit.source import open_source as open_source
from moekit.source import register_source as register_source
from moekit.source import require_parameter as require_parameter
from moekit.source import source_class as source_class
