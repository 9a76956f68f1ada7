//! Names of sites and locations in a filter.

use std::fmt;
use std::str::FromStr;

use entity::{data_location, site};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden as _, JoinType, Query};
use sea_orm::{ConnectionTrait, DbErr};

use super::ListError;
use super::ends::TransferEnd;

/// A site, or a location at a site, written `SITE` or `SITE/LOCATION`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// Short name of the site.
    pub site: String,
    /// Name of the location; `None` for all locations of the site.
    pub location: Option<String>,
}

impl FromStr for Place {
    type Err = InvalidPlace;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (site, location) = match text.split_once('/') {
            Some((site, location)) => (site, Some(location)),
            None => (text, None),
        };
        if site.is_empty() || location == Some("") {
            return Err(InvalidPlace(text.to_owned()));
        }
        Ok(Self {
            site: site.to_owned(),
            location: location.map(str::to_owned),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Some(location) => write!(f, "{}/{location}", self.site),
            None => f.write_str(&self.site),
        }
    }
}

/// Error for a text that is not a [`Place`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither SITE nor SITE/LOCATION")]
pub struct InvalidPlace(String);

/// A location of the database with its names.
pub(super) struct KnownPlace {
    id: i64,
    at: TransferEnd,
}

pub(super) async fn known_places(db: &impl ConnectionTrait) -> Result<Vec<KnownPlace>, DbErr> {
    use data_location::{Column, Entity};
    let query = Query::select()
        .expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), "id")
        .expr_as(Expr::col((Entity, Column::Name)), "location")
        .expr_as(
            Expr::col((site::Entity, site::Column::ShortName)),
            "site".into_iden(),
        )
        .from(Entity)
        .join(
            JoinType::InnerJoin,
            site::Entity,
            Expr::col((site::Entity, site::Column::Id)).equals((Entity, Column::SiteId)),
        )
        .to_owned();
    let rows = db.query_all(&query).await?;
    rows.iter()
        .map(|row| {
            Ok(KnownPlace {
                id: row.try_get("", "id")?,
                at: TransferEnd {
                    site: row.try_get("", "site")?,
                    location: row.try_get("", "location")?,
                },
            })
        })
        .collect()
}

/// Returns the ids of the locations that match `place`.
pub(super) fn ids_of(known: &[KnownPlace], place: &Place) -> Result<Vec<i64>, ListError> {
    let is_meant = |known: &&KnownPlace| {
        known.at.site == place.site
            && place
                .location
                .as_ref()
                .is_none_or(|location| known.at.location == *location)
    };
    let ids: Vec<_> = known
        .iter()
        .filter(is_meant)
        .map(|known| known.id)
        .collect();
    if !ids.is_empty() {
        return Ok(ids);
    }
    let of_the_site: Vec<_> = known
        .iter()
        .filter(|known| known.at.site == place.site)
        .map(|known| format!("{}/{}", known.at.site, known.at.location))
        .collect();
    let mut known = if of_the_site.is_empty() {
        known.iter().map(|known| known.at.site.clone()).collect()
    } else {
        of_the_site
    };
    known.sort();
    known.dedup();
    Err(ListError::UnknownPlace {
        place: place.clone(),
        known,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ccat", Some(("ccat", None)))]
    #[case("ccat/buffer", Some(("ccat", Some("buffer"))))]
    #[case("", None)]
    #[case("/buffer", None)]
    #[case("ccat/", None)]
    fn places_are_read(#[case] text: &str, #[case] expected: Option<(&str, Option<&str>)>) {
        let expected = expected.map(|(site, location)| Place {
            site: site.to_owned(),
            location: location.map(str::to_owned),
        });
        assert_eq!(text.parse().ok(), expected);
        if let Some(place) = expected {
            assert_eq!(place.to_string(), text);
        }
    }

    #[test]
    fn unknown_place_is_reported_with_known_ones() {
        let known = |id, site: &str, location: &str| KnownPlace {
            id,
            at: TransferEnd {
                site: site.to_owned(),
                location: location.to_owned(),
            },
        };
        let known = [known(1, "a", "x"), known(2, "a", "y"), known(3, "b", "x")];
        let ids = |place: &str| ids_of(&known, &place.parse().unwrap());
        assert_eq!(ids("a").unwrap(), [1, 2]);
        assert_eq!(ids("b/x").unwrap(), [3]);
        let said = |place| ids(place).unwrap_err().to_string();
        assert_eq!(said("c"), "there is no `c`; the database has a, b");
        assert_eq!(said("a/z"), "there is no `a/z`; the database has a/x, a/y");
    }
}
