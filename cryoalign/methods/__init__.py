"""The four methods: multi-reference and reference-free alignment, classification, ISAC.

`METHODS` lists them by name. To add a method, write a `base.Method` and add it to this list.
"""

from cryoalign.methods.base import Method
from cryoalign.methods.classify.classify import Classification
from cryoalign.methods.isac.isac import StableClassification
from cryoalign.methods.mra import MultiReference
from cryoalign.methods.rfa import ReferenceFree

METHODS: dict[str, type[Method]] = {
    each.name: each
    for each in (MultiReference, ReferenceFree, Classification, StableClassification)
}
