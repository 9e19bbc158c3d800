"""The embedded corpus: generated languages with real grammar differences and known truth."""

from moekit.data.sources.babel.grammar import Grammar as Grammar
from moekit.data.sources.babel.headlines import Headlines as Headlines
from moekit.data.sources.babel.language import Language as Language
from moekit.data.sources.babel.meaning import Meaning as Meaning
from moekit.data.sources.babel.meaning import Phrase as Phrase
from moekit.data.sources.babel.source import Babel as Babel
from moekit.data.sources.babel.source import BabelSettings as BabelSettings
from moekit.data.sources.babel.source import hard_settings as hard_settings
