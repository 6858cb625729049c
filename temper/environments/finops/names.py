"""The words that worlds are made of, apart by split: no company, partner, department or region of the
train split appears in dev or in the sealed test, so that memory does not help."""

from __future__ import annotations

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
TENANTS = ("bank_a", "retail_b", "saas_c")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
