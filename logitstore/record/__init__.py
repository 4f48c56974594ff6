"""Records as numpy: columns, schema, derived labels and masks, the random function, statistics."""

from logitstore.record.record import Record, columns_needed
from logitstore.record.schema import aux_fields, build_schema, id_dtype

__all__ = ["Record", "aux_fields", "build_schema", "columns_needed", "id_dtype"]
