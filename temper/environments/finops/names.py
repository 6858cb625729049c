"""The names that worlds are made of, apart by split: no company, partner, department, region or account of the
train split appears in dev or in the sealed test, so that memory does not help.

Every name has two words. The words are shared, their pairings are not: a pairing belongs to one split for good
(`split_of`). There are more pairings than a model can learn by heart, so that copying is the only way.
"""

from __future__ import annotations

from functools import cache

from temper.core.hashing import stream_seed
from temper.core.records import Split

COMPANY_HEADS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Halden", "Norwick", "Castell", "Brimley", "Ostrava", "Kelmar", "Tavish", "Lindow", "Marrick", "Solway", "Denholm", "Ferrow",
        "Garrick", "Hexley", "Ivarson", "Jorvik", "Kestrel", "Lomax", "Mordan", "Nesbit", "Orrin", "Pellam", "Quarry", "Rendal",
    ),
    "dev": ("Aldous", "Bexhill", "Corvane", "Dunmore", "Elstow", "Farleigh", "Gilmore", "Hartwell"),
    "test": ("Stanmore", "Thornby", "Ulverston", "Varley", "Wexcombe", "Yarrow", "Zelmont", "Ambrose"),
}  # fmt: skip
COMPANY_TAILS: dict[Split, tuple[str, ...]] = {
    "train": ("Freight", "Foods", "Textiles", "Energy", "Robotics", "Health", "Retail", "Marine", "Glass", "Motors"),
    "dev": ("Optics", "Dairy", "Timber", "Airways"),
    "test": ("Ceramics", "Pharma", "Railways", "Farms"),
}
PARTNER_HEADS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Harbor", "Cedar", "Granite", "Summit", "Willow", "Copper", "Falcon", "Meadow", "Silver", "Canyon", "Atlas", "Beacon",
        "Delta", "Ember", "Fjord", "Glacier", "Horizon", "Indigo", "Juniper", "Lantern", "Maple", "Nimbus", "Orchard", "Prairie",
    ),
    "dev": ("Quartz", "Raven", "Sable", "Tundra", "Umber", "Violet", "Walnut", "Zephyr"),
    "test": ("Aspen", "Basalt", "Cobalt", "Dune", "Elm", "Flint", "Grove", "Heron"),
}  # fmt: skip
PARTNER_TAILS: dict[Split, tuple[str, ...]] = {
    "train": ("Tools", "Media", "Supply", "Print", "Cleaning", "Parts", "Software", "Catering", "Security", "Paper"),
    "dev": ("Leasing", "Courier", "Studios", "Lighting"),
    "test": ("Plumbing", "Telecom", "Packaging", "Training"),
}
DEPARTMENTS: dict[Split, tuple[str, ...]] = {
    "train": ("Marketing", "Sales", "Engineering", "Logistics", "Support", "Legal", "Research", "Design", "Operations", "Facilities", "Quality", "Finance"),
    "dev": ("Procurement", "Analytics", "Compliance", "Recruiting", "Security"),
    "test": ("Planning", "Insurance", "Production", "Training", "Communications"),
}  # fmt: skip
REGIONS: dict[Split, tuple[str, ...]] = {
    "train": (
        "East China",
        "North Europe",
        "Gulf Coast",
        "South India",
        "West Africa",
        "New England",
        "Benelux",
        "Nordics",
        "Iberia",
        "Midwest",
    ),
    "dev": ("Central Asia", "South Korea", "Pacific Coast", "Baltics"),
    "test": ("East Africa", "North India", "South China", "Balkans"),
}
CASH_ACCOUNTS: dict[Split, tuple[str, ...]] = {
    "train": ("Operating", "Payroll", "Reserve", "Collections", "Treasury"),
    "dev": ("Disbursement", "Deposit", "Savings"),
    "test": ("Settlement", "Checking", "Imprest"),
}
MORE_DEPARTMENTS = (
    "Accounting", "Administration", "Advertising", "Assembly", "Audit", "Aviation", "Branding", "Brokerage", "Catering", "Chemistry", "Claims", "Cleaning", "Coaching", "Construction", "Consulting", "Content", "Contracts", "Controlling", "Creative", "Credit", "Customs", "Data", "Delivery", "Development", "Dispatch", "Distribution", "Documentation", "Editorial", "Education", "Energy", "Events", "Export", "Fleet", "Forestry", "Fundraising", "Gardening", "Governance", "Graphics", "Grants", "Growth", "Hardware", "Harvest", "Hosting", "Import", "Infrastructure", "Inspection", "Integration", "Inventory", "Investment", "Kitchen", "Laboratory", "Laundry", "Leasing", "Library", "Licensing", "Lobby", "Maintenance", "Manufacturing", "Mapping", "Merchandising", "Milling", "Mobility", "Networks", "Nursing", "Onboarding", "Packaging", "Parking", "Partnerships", "Payments", "Pensions", "Permits", "Photography", "Plant", "Pricing", "Printing", "Privacy", "Products", "Programming", "Projects", "Property", "Publishing", "Purchasing", "Reception", "Recycling", "Refunds", "Rentals", "Repairs", "Reporting", "Resources", "Risk", "Robotics", "Roofing", "Safety", "Sanitation", "Scheduling", "Science", "Services", "Shipping", "Simulation", "Sourcing", "Staffing", "Standards", "Statistics", "Storage", "Strategy", "Subscriptions", "Supply", "Surveying", "Sustainability", "Systems", "Talent", "Tax", "Telephony", "Testing", "Tooling", "Tourism", "Trading", "Translation", "Transport", "Utilities", "Validation", "Vehicles", "Visuals", "Warehousing", "Waste", "Welding", "Wellness", "Workshops",
)
DIRECTIONS = ("North", "South", "East", "West", "Central", "Upper", "Lower", "Inner", "Outer", "Greater")
PLACES = (
    "America", "Arabia", "Asia", "Bavaria", "Bengal", "Brazil", "Burma", "Canada", "Carolina", "Castile", "Chile", "Congo", "Cornwall", "Dakota", "Denmark", "Egypt", "England", "France", "Galicia", "Georgia", "Ghana", "Greece", "Holland", "Hungary", "Iceland", "Ireland", "Italy", "Japan", "Jutland", "Kenya", "Lapland", "Lombardy", "London", "Mexico", "Morocco", "Nepal", "Norway", "Ontario", "Peru", "Poland", "Prussia", "Quebec", "Saxony", "Scotland", "Siberia", "Spain", "Sweden", "Texas", "Tuscany", "Virginia", "Wales", "Yorkshire", "Zambia",
)
MORE_ACCOUNTS = (
    "Escrow", "Merchant", "Sweep", "Lockbox", "Dividend", "Rent", "Travel", "Refund", "Sterling", "Dollar", "Clearing", "Trust", "Grant", "Project", "Insurance", "Pension", "Capital", "Branch", "Agency", "Holding", "Transit", "Customs", "Fleet", "Harvest", "Import", "Export", "Retail", "Wholesale", "Online", "Donation", "Bond", "Margin", "Tuition", "Royalty", "Deputy", "Bonus",
)
SYLLABLES = (
    "al", "an", "ar", "bel", "bor", "cal", "dan", "del", "dor", "el", "en", "fal", "far", "gar", "hal", "hol", "il", "jor", "kal", "kar", "lan", "lem", "lor", "mar", "mel", "mor", "nal", "nor", "os", "par", "pel", "ral", "ren", "ros", "sal", "sel", "sor", "tan", "tor", "ul", "val", "ven", "vor", "wel", "win", "yor", "zan",
)
TENANTS = ("bank_a", "retail_b", "saas_c")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
UNITS = ("Field", "Digital", "Group", "Regional", "Corporate", "Global", "Retail", "Central", "Export", "Junior")
HOLDERS = ("Main", "Euro", "Dollar", "Branch", "Local", "Joint", "Second", "Group", "Old", "Night")
SHARES: tuple[tuple[int, Split], ...] = ((80, "train"), (90, "dev"), (100, "test"))  # of a hundred pairings


def split_of(name: str) -> Split:
    """The one split that may use a name."""
    place = stream_seed(0, "names", name) % 100
    return next(split for below, split in SHARES if place < below)


@cache
def pairings(kind: str, split: Split) -> tuple[str, ...]:
    """Every `department`, `region` or `account` name of a split."""
    firsts, seconds = {
        "department": (UNITS, (*(name for names in DEPARTMENTS.values() for name in names), *MORE_DEPARTMENTS)),
        "region": (DIRECTIONS, PLACES),
        "account": (HOLDERS, (*(name for names in CASH_ACCOUNTS.values() for name in names), *MORE_ACCOUNTS)),
    }[kind]
    return tuple(name for first in firsts for second in seconds if split_of(name := f"{first} {second}") == split)
