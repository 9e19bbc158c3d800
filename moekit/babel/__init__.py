"""The embedded corpus: generated languages with real grammar differences and known truth."""

from moekit.babel.facts import Facts as Facts
from moekit.babel.grammar import Grammar as Grammar
from moekit.babel.headlines import Headlines as Headlines
from moekit.babel.language import Language as Language
from moekit.babel.meaning import Meaning as Meaning
from moekit.babel.meaning import Phrase as Phrase
from moekit.babel.source import Babel as Babel
from moekit.babel.source import BabelSettings as BabelSettings
from moekit.babel.source import hard_settings as hard_settings
