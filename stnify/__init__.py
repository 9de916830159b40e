"""stnify: any PyTorch model tunes its own regularisation hyperparameters while it trains."""

from stnify.bundle import STN as STN
from stnify.convert import stnify as stnify
from stnify.declare import Declaration as Declaration
from stnify.declare import Dropout as Dropout
from stnify.declare import Hyperparameter as Hyperparameter
from stnify.declare import WeightDecay as WeightDecay
from stnify.errors import DeclarationError as DeclarationError
from stnify.errors import ShapeError as ShapeError
from stnify.errors import StnifyError as StnifyError
from stnify.errors import TraceError as TraceError
from stnify.errors import UnsupportedModuleError as UnsupportedModuleError
from stnify.errors import UsageError as UsageError
from stnify.plan import Plan as Plan
from stnify.schedule import History as History
from stnify.space import HyperparameterSpace as HyperparameterSpace
from stnify.tunable import TunableModule as TunableModule

__version__ = "0.1.0"
